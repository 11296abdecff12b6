"""A lost rank is told from a mistake of the user, wherever it is noticed."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import typer
from transformers import LlamaConfig

from dpo_dist import cli
from dpo_dist.adapters.attach import _peft_errors
from dpo_dist.batch import build_micro_batch
from dpo_dist.checkpoint.shards import load_shards
from dpo_dist.config.adapter import AdapterConfig
from dpo_dist.errors import CheckpointError, ConfigError, ModelError, PeerLostError, StorageError
from dpo_dist.model import load_model, scoring
from dpo_dist.peers import is_peer_lost, peer_lost, raise_if_peer_lost
from dpo_dist.selfcheck.own_forward import _ask
from tests.run_states import empty_shards
from tests.tiny_engine import only_rank

LOST = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:40120")
MISTAKE = RuntimeError("Error(s) in loading state_dict: size mismatch")


@pytest.mark.parametrize(
    "error",
    [
        LOST,
        RuntimeError("Read error [127.0.0.1]:29500: Connection reset by peer"),
        RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation"),
        dist.DistBackendError("NCCL error: remote process exited or there was a network error, NCCL version 2.29"),
        dist.DistBackendError("ncclRemoteError: A call failed possibly due to a network error"),
        dist.DistNetworkError("failed to recv, got 0 bytes"),
        dist.DistStoreError("Timed out after 61 seconds waiting for clients. 1/2 clients joined."),
        RuntimeError("rank 1 failed: RuntimeError: Connection closed by peer"),
        PeerLostError("another rank is gone"),
    ],
)
def test_it_is_known_by_its_words(error: RuntimeError) -> None:
    assert is_peer_lost(error)
    with pytest.raises(PeerLostError, match="another rank is gone"):
        raise_if_peer_lost(error)


@pytest.mark.parametrize(
    "error",
    [
        None,
        MISTAKE,
        ConnectionResetError(104, "Connection reset by peer"),  # a download
        BrokenPipeError(32, "Broken pipe"),
        StorageError("runs/a cannot be written ([Errno 104] Connection reset by peer)"),  # a network's disk
        dist.DistBackendError("ncclInvalidUsage: Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 0"),
        dist.DistNetworkError("The server socket has failed to listen on any local network address. EADDRINUSE"),
    ],
)
def test_other_errors_are_not_taken_for_it(error: Exception | None) -> None:
    assert not is_peer_lost(error)


def test_it_is_found_as_a_cause_and_named() -> None:
    error = ModelError("a cannot be loaded")
    error.__cause__ = RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:34734: Connection reset by "
        "peer. This is typically caused by a remote worker hanging"
    )
    assert is_peer_lost(error)
    assert "hangs (Read error [127.0.0.1]:34734: Connection reset by peer); see" in str(peer_lost(error))


def _raising(error: Exception) -> Any:
    def call(*arguments: object, **options: object) -> None:
        raise error

    return call


BOTH = pytest.mark.parametrize(("error", "expected"), [(LOST, PeerLostError), (MISTAKE, None)])


@BOTH
def test_while_a_model_loads(error: Exception, expected: type | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_by_transformers", _raising(error))
    with pytest.raises(expected or ModelError):
        load_model(Path("a"), LlamaConfig(), "sdpa", torch.float32, {}, False, False, None)


@BOTH
def test_while_shards_load(error: Exception, expected: type | None, tmp_path: Path) -> None:
    class Engine:
        checkpoint_engine = None
        load_checkpoint = staticmethod(_raising(error))
        zero_optimization_stage = staticmethod(lambda: 0)
        optimizer = None

    only_rank()
    empty_shards(tmp_path)
    with pytest.raises(expected or CheckpointError):
        load_shards(Engine(), tmp_path)


@BOTH
def test_while_an_adapter_is_attached(error: Exception, expected: type | None) -> None:
    with pytest.raises(expected or ConfigError), _peft_errors(AdapterConfig(peft_type="lora")):
        raise error


@BOTH
def test_in_the_models_own_forward(error: Exception, expected: type | None) -> None:
    class Engine:
        model, dtype = None, torch.float32
        token_logps = own_token_logps = staticmethod(_raising(error))

    with pytest.raises(expected or ModelError):
        _ask(Engine(), build_micro_batch([], [], share_prompts=False))


def test_it_is_one_line_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    for error in (LOST, PeerLostError("another rank is gone")):
        with pytest.raises(typer.Exit) as end, cli.user_errors():
            raise error
        assert end.value.exit_code == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: another rank is gone")
