"""Photos in an object store, on a real S3 server of this machine; and without it."""

import importlib
import importlib.util
import io
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from microclip_deploy.adapt.loader import AdaptImages
from microclip_deploy.adapt.views import ViewConfig
from microclip_deploy.cli.main import main
from microclip_deploy.data import remote
from microclip_deploy.data.archive import exists
from microclip_deploy.data.contents import contents
from microclip_deploy.data.packing import PackConfig, pack
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.data.sources import check_images, list_images, list_sources
from microclip_deploy.errors import DataError, EnvironmentProblem

obstore = pytest.importorskip("obstore", reason="needs the extra remote")
if importlib.util.find_spec("moto") is None:
    pytest.skip("needs moto[s3,server]", allow_module_level=True)

TINY = Preprocess(size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


class Server:
    """A server of this machine that can be ended."""

    def __init__(self, *arguments: str, cwd: Path | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, *arguments, str(self.port)]
        self._process = subprocess.Popen(
            command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError("the server does not answer")

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("remote") / "photos"
    for number in range(6):
        path = root / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10), (10 * number,) * 3).save(path)
    pack(list_images(root), root.parent / "pack", PackConfig())
    return root


@pytest.fixture(scope="module")
def started(pictures: Path) -> Iterator[Server]:
    """Yield a server whose bucket holds the photos loose, packed, and in a tar without index."""
    server = Server("-m", "moto.server", "-p")
    try:
        boto3 = importlib.import_module("boto3")  # comes with moto
        keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret"}
        client = boto3.client("s3", endpoint_url=server.address, region_name="us-east-1", **keys)
        client.create_bucket(Bucket="bucket")
        for path in sorted(pictures.parent.rglob("*")):
            if path.is_file() and path.name != ".lock":
                key = path.relative_to(pictures.parent).as_posix()
                for name in (key, "foreign/x.tar")[: 1 + (path.suffix == ".tar")]:
                    public = {"Bucket": "bucket", "Key": name, "ACL": "public-read"}
                    client.put_object(**public, Body=path.read_bytes())
        yield server
    finally:
        server.end()


@pytest.fixture
def server(started: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Yield the server, with what a user sets to reach it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", started.address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    forget()
    yield started
    forget()


def forget() -> None:
    remote.status.cache_clear()
    remote._store.cache_clear()


def parts(source: Any) -> list[tuple[str, ...]]:
    return [path.parts[-2:] for path in list_images(source).paths]


def test_loose_packed_and_foreign_photos_are_read_as_from_disk(
    tmp_path: Path, pictures: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    local = list_images(pictures)
    for place in ("photos", "pack", "foreign/x.tar", "foreign"):
        found = list_images(f"s3://bucket/{place}")
        assert parts(f"s3://bucket/{place}") == parts(pictures)
        assert found.labels == local.labels
        assert check_images(found.paths).good == found.paths
        assert contents(found.paths) == contents(local.paths)
        assert all(map(exists, found.paths.texts))
    assert len(list((tmp_path / "microclip-deploy").iterdir())) == 1  # of the tar without one
    assert len(list_sources([Path("s3://bucket/photos/cat/0.png"), pictures]).paths) == 7
    assert main(["pack", "s3://bucket/photos", "-o", str(tmp_path / "pack")]) == 0
    assert parts(tmp_path / "pack") == parts(pictures)
    with pytest.raises(DataError, match=r"expected images|found nothing"):
        list_images("s3://bucket/nothing")


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_tables_in_a_store_are_read(pictures: Path, server: Server, name: str) -> None:
    pa = pytest.importorskip("pyarrow", reason="needs the extra parquet")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra parquet")
    table, sink = pa.table({"image": [(pictures / "cat" / "2.png").read_bytes()] * 3}), io.BytesIO()
    if name == "x.parquet":
        parquet.write_table(table, sink)
    else:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    store = obstore.store.from_url("s3://bucket", client_options={"allow_http": True})
    obstore.put(store, f"tables/{name}", sink.getvalue())
    found = list_images(f"s3://bucket/tables/{name}")
    assert contents(found.paths) == contents([pictures / "cat" / "2.png"] * 3)


@pytest.mark.parametrize("place", ["photos", "pack", "foreign/x.tar"])
def test_predictions_of_a_bucket_go_on_after_a_cut(
    place: str, tmp_path: Path, pictures: Path, server: Server, tiny_export: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra parquet")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(remote, "RETRY_S", 0.2)
    assert main(["predict", str(tiny_export), f"s3://bucket/{place}", "--format", "csv"]) == 0
    assert f"\ns3://bucket/{place}/" in capsys.readouterr().out.replace("\r", "")
    out, own = tmp_path / "shards", tmp_path / "own"
    options = ["--shard-rows", "2", "--device", "cpu", "--threads", "1"]
    command = ["predict", str(tiny_export), f"s3://bucket/{place}", *options, "--out", f"{out}/"]
    assert main([*command, "--part", "2/3"]) == 0
    monkeypatch.chdir(tmp_path)  # a part may run anywhere
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    forget()
    assert main(command) == 4
    assert "expected an answer of the store" in capsys.readouterr().err
    assert [path.name for path in out.glob("shard-*")] == ["shard-00001.parquet"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
    forget()
    assert main(command) == 0
    assert main(["predict", str(tiny_export), str(pictures), *options, "--out", f"{own}/"]) == 0
    found, wanted = parquet.read_table(out), parquet.read_table(own)
    assert found.drop_columns(["path"]).equals(wanted.drop_columns(["path"]))
    assert found["path"][0].as_py().startswith(f"s3://bucket/{place}/")


def test_missing_credentials_are_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RETRY_S", 0.2)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    forget()
    with pytest.raises(EnvironmentProblem, match="AWS_SKIP_SIGNATURE=true"):
        list_images("s3://bucket/pack")
    monkeypatch.setenv("HOME", "/nowhere")
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
    with pytest.raises(EnvironmentProblem, match=r"no credentials, .* GOOGLE_SKIP_SIGNATURE=true"):
        list_images("gs://bucket/pack")


def test_gs_is_read_with_a_key_file(
    tmp_path: Path, pictures: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's S3 dialect is that of Google's XML interface, which obstore speaks."""
    account = {"gcs_base_url": server.address, "disable_oauth": True, "client_email": ""}
    (tmp_path / "key.json").write_text(
        json.dumps({**account, "private_key": "", "private_key_id": ""})
    )
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "key.json"))
    for place in ("photos", "pack"):
        found = list_images(f"gs://bucket/{place}")
        assert contents(found.paths) == contents(list_images(pictures).paths)
        assert check_images(found.paths).good == found.paths
    with pytest.raises(DataError, match="found no files"):
        list_images("gs://bucket/nothing")
    (tmp_path / "key.json").unlink()
    forget()
    with pytest.raises(EnvironmentProblem, match=r"key\.json.*set GOOGLE_SERVICE_ACCOUNT, a key"):
        list_images("gs://bucket/photos")


WEB = """
import sys, uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles
app = Starlette(routes=[Mount("/", StaticFiles(directory="."))])
own = dict(zip(["ssl_certfile"], sys.argv[1:-1]))
uvicorn.run(app, port=int(sys.argv[-1]), log_level="error", **own)
"""


def test_a_web_server_gives_packs(pictures: Path) -> None:
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    server = Server("-c", WEB, cwd=pictures.parent)
    try:
        found = list_images(f"{server.address}/pack")
        assert contents(found.paths) == contents(list_images(pictures).paths)
        with pytest.raises(DataError, match="found no files"):
            list_images(f"{server.address}/nothing")
    finally:
        server.end()


def test_a_private_authority_is_trusted_where_it_is_named(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    trustme = pytest.importorskip("trustme", reason="makes the certificates")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    own = authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem
    own.write_to_path(tmp_path / "own.pem")
    monkeypatch.setattr(remote, "RETRY_S", 0.2)
    server = Server("-c", WEB, str(tmp_path / "own.pem"), cwd=pictures.parent)
    address = f"https://127.0.0.1:{server.port}/pack"
    try:
        with pytest.raises(
            EnvironmentProblem, match=r"not trusted \(UnknownIssuer\); set SSL_CERT"
        ):
            list_images(address)
        forget()
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
        assert contents(list_images(address).paths) == contents(list_images(pictures).paths)
    finally:
        server.end()
        forget()


def test_a_cut_network_ends_an_epoch_and_it_is_resumed_exactly(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, adapt_arguments: list[str]
) -> None:
    adapt_arguments[1] = "s3://bucket/pack"
    # A process of its own: workers are forked from a server that keeps the environment it began in.
    command = [sys.executable, "-m", "microclip_deploy", *adapt_arguments, "--epochs", "1"]
    subprocess.run([*command, "--workers", "1"], check=True, capture_output=True)
    whole_run = (tmp_path / "run" / "weights.safetensors").read_bytes()
    (tmp_path / "run" / "manifest.json").unlink()
    monkeypatch.setattr(remote, "RETRY_S", 0.2)
    forget()
    images = AdaptImages(list_images("s3://bucket/pack").paths, TINY, ViewConfig(crops=1), seed=0)
    whole = [batch.weak for batch in images.epoch(0, 2)]
    batches = images.epoch(0, 2)
    first = next(batches)
    server.end()
    with pytest.raises(EnvironmentProblem, match=r"s3://bucket/pack/.*tried for up to.*--resume"):
        next(batches)
    assert first.weak.equal(whole[0])
    with pytest.raises(EnvironmentProblem, match="expected an answer of the store"):
        check_images(images.paths)
    assert main(["adapt", "-o", str(tmp_path / "run"), "--resume"]) == 4
    assert (tmp_path / "run" / "weights.safetensors").read_bytes() == whole_run
