"""What the letters' model was trained on: captions and their merges."""

from pathlib import Path
from random import Random

from microclip_deploy.bench.letters_model.bpe import train_merges
from microclip_deploy.bench.letters_model.captions import PRETRAINING_CHARACTERS, caption
from microclip_deploy.bench.letters_model.pretrain import MERGES_FILE, write_tokenizer
from microclip_deploy.demo import letters
from microclip_deploy.demo.letters.render import PrintStyle


def test_the_recipe_writes_the_shipped_merges(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    shipped = Path(letters.__file__).parent / "model" / MERGES_FILE
    assert (tmp_path / MERGES_FILE).read_bytes() == shipped.read_bytes()


def test_merges_stop_at_rare_pairs() -> None:
    assert train_merges(["ab ab cd"], 10) == []
    assert train_merges(["ab ab ab cd"], 10) == [("a", "b</w>")]


def test_every_glyph_has_captions() -> None:
    style = PrintStyle("bold sans", "red", "white")
    assert all(caption(c, Random(seed), style) for c in PRETRAINING_CHARACTERS for seed in range(5))
