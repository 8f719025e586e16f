import subprocess
import sys
from pathlib import Path

HIDDEN = "import sys; sys.modules['pyarrow'] = None\n"
REMEDY = 'pip install "microclip-deploy[parquet]"'


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-c", HIDDEN + code, *arguments]
    return subprocess.run(call, capture_output=True, text=True, check=False)


def test_a_missing_pyarrow_comes_with_its_install_line(tmp_path: Path) -> None:
    command = "from microclip_deploy.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    found = run(command, "predict", "run", "photos", "--out", f"{tmp_path}/")
    assert (found.returncode, found.stderr.count("\n")) == (4, 1)
    assert REMEDY in found.stderr
    found = run("import microclip_deploy.bulk")
    assert "EnvironmentProblem" in found.stderr
    assert REMEDY in found.stderr
