"""A model that is asked which labels it contradicts: loaded in this process, with no engine and no process group."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from dpo_dist.attention import choose_backend
from dpo_dist.attention.interface import register
from dpo_dist.batch import MicroBatch
from dpo_dist.cli.architectures import Architecture, require_positions
from dpo_dist.cli.ending import advising
from dpo_dist.cli.prepare import this_device
from dpo_dist.cli.reading import tokenizer_if_any
from dpo_dist.config import RunConfig
from dpo_dist.errors import ModelError, NumericsError
from dpo_dist.inspection import PairColumns
from dpo_dist.inspection.doubts import Doubts, find_doubts
from dpo_dist.model import ScoringModel, find_fit, four_bits, load_model, require_liger, try_architecture
from dpo_dist.packing import TOKENS, Packer, longest_example, sizes_of
from dpo_dist.pretrained import DTYPES, attention_needs, decide_sharing, load_config, resolve_folder
from dpo_dist.reference.selection import Selection, plans, score
from dpo_dist.tokenization import TokenizedDataset, TokenizerSpec

OWN = ""  # what stands for the configuration's own reference
_KEY = "model.model_name_or_path"
_SECONDS_BETWEEN_LINES = 60.0
_ADVICE = "lower packing.max_tokens, or name a smaller model with --model"

logger = logging.getLogger(__name__)


class Asked:
    """The model that is asked; mistakes in what the user named are found before any data are read.

    Args:
        config: of the run.
        cache_dir: where dpo-dist keeps what it computes.
        name: a folder, a hub id or demo; OWN: the run's reference, which is its policy where it names no other.
    Raises:
        ModelError: it cannot be used.
    """

    def __init__(self, config: RunConfig, cache_dir: Path, name: str) -> None:
        model, self._config, self._is_own = config.model, config, name == OWN
        revision, self._key = None, "--model"
        if self._is_own:
            self._key, name = "model.reference_name_or_path", model.reference_name_or_path or ""
        if not name:
            self._key, name, revision = _KEY, model.model_name_or_path, model.revision
        self.name = name
        self._folder = resolve_folder(name, self._key, revision, cache_dir)
        self._model_config = load_config(self._folder, model.trust_remote_code, self._key)
        with self._named():
            self._shares_prompts = decide_sharing(self._model_config, model.prefix_sharing)[0]
            find_fit(self._folder, self._model_config, model.trust_remote_code).require(self._key, self._folder)
        policy = resolve_folder(model.model_name_or_path, _KEY, model.revision, cache_dir)
        self._is_policys_base = self._is_own and self._folder == policy
        self._policy_vocabulary = load_config(policy, model.trust_remote_code).vocab_size

    def doubts(self, dataset: TokenizedDataset, tokenizer: TokenizerSpec) -> Doubts | None:
        """The labels that it contradicts; None where there are no pairs.

        Args:
            dataset: in memory only a number for each completion is held of it, and one micro-batch.
            tokenizer: what made its ids.
        Raises:
            DpoDistError: the ids are not the model's, a row does not fit, or a log-probability is not finite.
        """
        columns = PairColumns(dataset)
        if not len(columns.example):
            return None
        self._require_ids(dataset, tokenizer)
        packing, trust = self._config.packing, self._config.model.trust_remote_code
        packer = Packer(1, packing.max_tokens, packing.max_tokens, self._shares_prompts, TOKENS)
        row = longest_example(dataset, self._shares_prompts)
        packer.require_fit(sizes_of(dataset, [row])[0], dataset.source_of(row))
        with self._named():
            tried = try_architecture(self._model_config, self._key, self._shares_prompts, trust)
            require_positions([Architecture(self._key, self._model_config, tried)], {"data.train": dataset}, 0)
        with advising(_ADVICE):
            scorer = self._loaded()
            return find_doubts(columns, self.name, _logps(scorer, columns, packer))

    def _require_ids(self, dataset: TokenizedDataset, tokenizer: TokenizerSpec) -> None:
        """Scores of ids that another tokenizer made would be those of another text."""
        size, way_out = self._model_config.vocab_size, ""
        if not self._is_own:
            way_out = (
                f"give a model with the same one, or inspect the data as this model reads them: {_KEY}={self.name} "
                "model.tokenizer_name_or_path=null model.reference_name_or_path=null --model"
            )
        own = tokenizer_if_any(TokenizerSpec(str(self._folder), None, tokenizer.trust_remote_code, self._key))
        datas = tokenizer_if_any(tokenizer)
        if own is None or datas is None or self._is_own:
            if size != self._policy_vocabulary:
                raise ModelError(
                    f"{self._key}={self.name} has a vocabulary of {size} tokens, and the policy one of "
                    f"{self._policy_vocabulary}; {way_out or 'both must score the same token ids'}"
                )
        else:
            theirs = {place: token for token, place in datas.get_vocab().items()}
            differing = [one for token, one in own.get_vocab().items() if theirs.get(one, token) != token]
            if differing:
                raise ModelError(
                    f"{self._key}={self.name} has another tokenizer than {tokenizer.key}={tokenizer.path}, whose token "
                    f"ids the data are: {len(differing)} ids mean other tokens, such as {min(differing)}; {way_out}"
                )
        dataset.check_vocabulary(size)

    def _loaded(self) -> "_Scorer":
        config, device = self._config, this_device()
        dtype = DTYPES[config.reference.dtype or config.model.dtype]
        kernel, _ = choose_backend(
            config.model.attn_implementation, device, dtype, [attention_needs(self._model_config)]
        )
        if config.model.use_liger_kernel:
            require_liger(device, self._model_config)
        # A quantised policy has its own frozen weights as reference; another model is read as it stands.
        quantization = four_bits(config.adapter, dtype) if self._is_policys_base else None
        with self._named():
            model = load_model(
                self._folder, self._model_config, register(kernel), dtype, {}, gradient_checkpointing=False,
                trust_remote_code=config.model.trust_remote_code, quantization=quantization,
                use_liger_kernel=config.model.use_liger_kernel,
            )  # fmt: skip
        if config.adapter.adapter_name_or_path is not None and self._is_policys_base:
            from dpo_dist.adapters import attach_adapter

            model = attach_adapter(model, config.adapter, str(self._folder), 0, None, {})
        return _Scorer(model, device)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """What the layers below say of the policy is said of this model."""
        try:
            yield
        except ModelError as error:
            raise ModelError(str(error).replace(_KEY, self._key)) from error.__cause__


class _Scorer:
    """A model on one device, without gradient."""

    def __init__(self, model: ScoringModel, device: torch.device) -> None:
        self.device = device
        self._model = model.requires_grad_(False).eval().to(device)

    @torch.no_grad()
    def token_logps(self, batch: MicroBatch) -> Float[Tensor, " M"]:
        """log pi(token | prefix) of every scored token, nats."""
        return self._model(batch.to(self.device))


def _logps(scorer: _Scorer, columns: PairColumns, packer: Packer) -> Float32[np.ndarray, " N"]:
    """Log-probability of every completion that is in a pair, nats; of the others NaN. Equal ones are computed once."""
    group, first = columns.completions.group, columns.completions.first
    places = np.sort(first[np.unique(group[np.concatenate([columns.chosen, columns.rejected])])])
    selection, last = Selection([columns.dataset], places), time.monotonic()
    found = np.full(len(group), np.nan, dtype=np.float32)
    logger.info("log-probabilities of %d different completions are computed on %s", len(places), scorer.device.type)
    for plan in plans(selection, packer):
        scores = score(scorer, plan, selection, packer, rank=0, with_tokens=False)
        if not np.isfinite(scores.logps).all():
            place = scores.chunk.start + int(np.flatnonzero(~np.isfinite(scores.logps))[0])
            raise NumericsError(
                f"{selection.source(place)}: the log-probability of a completion is not finite; compute in another "
                "number format (reference.dtype=float32), or name another model"
            )
        found[places[scores.chunk]] = scores.logps
        if (now := time.monotonic()) - last >= _SECONDS_BETWEEN_LINES:
            last = now
            logger.info("%d of %d completions", scores.chunk.stop, len(places))
    return found[first][group]
