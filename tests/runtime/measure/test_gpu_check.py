"""The checks for a card run on a CPU, small; what is wrong, missing or left out is said."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.docs.commands import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_check

ONCE = replace(gpu_check.SMALL, repeats=1, product_rows=(16,))


def test_all_checks_run_on_a_cpu() -> None:
    """Each compares its results and has the seconds of both sides."""
    figures, wrong = gpu_check.run_checks(torch.device("cpu"), ONCE, 1e9)
    assert wrong == []
    assert list(figures) == list(gpu_check.CHECKS)
    assert set(figures["decode"]) == {
        "exact_seconds",
        "fixed_seconds",
        "kept tensors_seconds",
        "kept tensors_difference",
    }
    assert figures["sampling"]["greedy"]["same_as_cpu"] == 1
    assert all(seconds > 0 for seconds in (figures["recorder"]["plain_seconds"], figures["decode"]["exact_seconds"]))


def test_what_is_wrong_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A result that differs fails its check and not the others; checks beyond the budget are left out."""

    def differ(sizes: gpu_check.Sizes, bench: gpu_check.Bench) -> gpu_check.Figures:
        return {"found": gpu_check.require_close(torch.ones(2), torch.tensor([1.0, 1.5]), 0.3, "numbers")}

    def agree(sizes: gpu_check.Sizes, bench: gpu_check.Bench) -> gpu_check.Figures:
        return {"found": gpu_check.require_close(torch.ones(2), torch.tensor([1.0, 1.5]), 0.4, "numbers")}

    monkeypatch.setattr(gpu_check, "CHECKS", {"products": differ, "sampling": agree})
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu", "--json", str(tmp_path / "f.json")])
    assert gpu_check.main() == 1
    document = json.loads((tmp_path / "f.json").read_text())
    assert document["figures"] == {"sampling": {"found": pytest.approx(1 / 3)}}
    assert document["wrong"] == [
        "products: AssertionError: numbers differ by 0.333 of the largest, more than 0.3",
    ]
    assert "numbers differ" in capsys.readouterr().err
    _, wrong = gpu_check.run_checks(torch.device("cpu"), ONCE, -1.0)
    assert [sentence.partition(":")[0] for sentence in wrong] == ["products", "sampling"]
    assert all("left out" in sentence for sentence in wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_card_is_told_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """One sentence, exit code 1."""
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert gpu_check.main() == 1
    err = capsys.readouterr().err
    assert err == "gpu_check: this machine has no GPU that torch can use; --device cpu runs the checks small\n"
