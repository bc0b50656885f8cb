"""What every test can ask for: a tiny model, the golden numbers, real preference data, the real small model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.shared_data import SHARED_DATA
from support.tiny_models import tiny_model_folder

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is first imported: no test asks the Hub for anything
os.environ["TOKENIZERS_PARALLELISM"] = "false"

TESTS = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama, made once; read it, do not write into it."""
    return tiny_model_folder(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of the numbers of TRL's DPO trainer."""
    return TESTS / "golden"


@pytest.fixture(scope="session")
def golden_family() -> Path:
    """The folder of the numbers of TRL's trainers of DPO's relatives: KTO, SFT, ORPO, CPO, SimPO."""
    return TESTS / "golden_family"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real preference data, which lies beside the project and not in it."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA} is not there: this data lies beside the project, not in it")
    return SHARED_DATA


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The folder of SmolLM2-135M-Instruct in float32, from the user's own cache or downloaded into it."""
    from mlx_dpo.demo.model import fetch_demo_model
    from mlx_dpo.errors import MlxDpoError

    try:
        return fetch_demo_model("float32")
    except MlxDpoError as error:
        pytest.skip(f"the real small model cannot be had: {error.message}")


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run answers at its evaluations is cut early: tests of other things need not wait for it."""
    monkeypatch.setattr("mlx_dpo.training.samples.LONGEST_ANSWER", 2)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's cache of reference log-probs."""
    monkeypatch.setenv("MLX_DPO_CACHE", str(tmp_path / "cache"))
