"""Requests that a machine makes up from the server's own description of itself."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.server.lasting import SECONDS, lasting
from tests.server.running import Running


@lasting
@pytest.mark.slow
@pytest.mark.skipif(find_spec("schemathesis") is None, reason="needs: pip install schemathesis")
def test_made_up_requests(server: Running, tmp_path: Path) -> None:
    """None is answered 5xx, and every answer is as the description says.

    A photo cannot be described, so made-up ones are refused: that check is left out.
    """
    [listed] = server.get("/v1/models").json()["models"]
    known = {name: {"type": "string", "const": listed[name]} for name in ("name", "version")}
    known["model"] = known.pop("name")
    document = server.get("/openapi.json").json()
    for operations in document["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                parameter["schema"] = known.get(parameter["name"], parameter["schema"])
    described = tmp_path / "openapi.json"
    described.write_text(json.dumps(document))
    command = [sys.executable, "-m", "schemathesis.cli", "run", str(described), "--url", server.url]
    command += ["--exclude-checks", "positive_data_acceptance", "--continue-on-failure"]
    command += ["--max-examples", "100000", "--max-time", f"{SECONDS:g}", "--no-color"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=2 * SECONDS + 60).stdout
    print(told[-10_000:])
    calls = {
        status: server.metric("microclip_requests_total", status=status)
        for status in ("200", "400", "404", "405", "408", "413", "415", "429", "500", "503", "504")
    }
    print(f"{sum(calls.values()):.0f} requests: {calls}")
    assert "Test Phases" in told
    assert "FAILURES" not in told
    assert calls["500"] == calls["503"] == calls["504"] == 0
    assert sum(calls.values()) > SECONDS
    assert server.is_ready()
