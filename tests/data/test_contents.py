"""What files hold, as hashes."""

from hashlib import sha256
from pathlib import Path

from microclip_deploy.data.contents import contents, copies


def test_files_are_known_by_their_bytes(tmp_path: Path) -> None:
    names = [tmp_path / name for name in "abcd"]
    for path, text in zip(names, (b"1", b"2", b"1", b"1"), strict=True):
        path.write_bytes(text)
    held = contents([*names, tmp_path / "gone"])
    assert held == [*(sha256(text).hexdigest() for text in (b"1", b"2", b"1", b"1")), None]
    assert copies(names, [str(each) for each in held]) == [names[2], names[3]]
