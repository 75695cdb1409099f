from __future__ import annotations

import json
from importlib import metadata

import pytest

from moelora_cli import doctor, main


def test_this_environment_is_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    assert found["packages"]["peft"]["version"]
    assert found["extras"]["trl"] is True
    assert found["packages"]["trl"]["extras"] == ["trl"]
    assert found["devices"][0].startswith("CPU, ")
    assert main(["doctor"]) == 0
    assert "Nothing is wrong." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({"transformers": "5.22.1", "peft": "0.21.2"}, "transformers 5.22.1 does not work: its Trainer"),
        ({"transformers": "5.24.0", "peft": "0.21.2"}, "transformers 5.24.0 with peft 0.21.2 does not work"),
        ({"transformers": "5.23.0", "peft": "0.21.1"}, "transformers 5.23.0 with peft 0.21.1 does not work"),
        ({"peft": "0.20.0"}, "peft 0.20.0 does not work: it refuses to save"),
        ({"peft": "0.22.0"}, "peft 0.22.0 does not work: its method tables"),
    ],
)
def test_known_bad_versions(versions: dict[str, str], message: str) -> None:
    (found,) = doctor.bad_pairs(versions)
    assert found.startswith(message)


def test_what_is_known_as_bad_is_what_the_bounds_exclude() -> None:
    bounds = {each.name: each.specifier for each in doctor.requirements()[""]}
    # a version on each side of every bound
    versions = {"transformers": ("5.22.9", "5.23", "5.24"), "peft": ("0.20", "0.21", "0.21.1", "0.21.2", "0.22")}
    for transformers in versions["transformers"]:
        for peft in versions["peft"]:
            allowed = bounds["transformers"].contains(transformers) and bounds["peft"].contains(peft)
            assert allowed == (not doctor.bad_pairs({"transformers": transformers, "peft": peft})), (transformers, peft)


def test_missing_and_wrong_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name in ("safetensors", "trl"):
            raise metadata.PackageNotFoundError(name)
        return "1.0" if name == "datasets" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["extras"]["trl"] is False
    missing, wrong = sorted(found["problems"], reverse=True)
    assert missing.startswith("safetensors is not installed; moelora needs >=0.8: `pip install")
    assert wrong.startswith("datasets 1.0 is installed; moelora needs >=4.7")
