"""The caches that all conversations of a model share: KV pages and image features, for as long as they are valid."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..cache.paged_cache import PagedKVCache
from ..images.feature_cache import ImageFeatureCache
from ..lock import DeferringLock
from ..models.config import VilaConfig
from ..models.params import checksum, leaves
from ..models.vila import Vila
from ..registry import explicit_choices
from ..registry.tuned_tables import default_choices_for


class VilaModel(Protocol):
    """The part of a model that conversations use; `vila_triton.VilaLlamaForCausalLM` has it."""

    config: Any
    generation_config: Any
    vila_config: VilaConfig

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def params(self) -> Vila: ...
    def parameter_versions(self) -> object: ...
    def state_dict(self) -> dict[str, Any]: ...
    def encode_images(self, images: Tensor) -> Tensor: ...
    def new_cache(self, num_sequences: int, *, max_pages: int | None = None) -> PagedKVCache: ...
    def generation_settings(self) -> dict[str, Any]: ...


@dataclass
class CacheSet:
    """Caches computed under one set of cache settings and, once they are first used, under one `model_state`: all that
    image features depend on.
    """

    cache: PagedKVCache
    feature_cache: ImageFeatureCache
    settings: dict[str, Any]
    model_state: tuple | None = None


class SharedCaches:
    """KV pages of all conversations, which share common prefixes, and features of the images asked about last.

    `max_pages` is the most pages there may be. The caches are replaced by empty ones when they no longer hold what the
    model would compute: after a parameter was replaced or written to in any way, when other adapters are active, when
    the config's numerics, kv_dtype or page_size change; under batch-invariant numerics also when `use` chooses other
    kernels. The check reads all parameters twice, which takes as long as about two tokens.
    """

    def __init__(self, model: VilaModel, max_pages: int | None = None):
        self.model = model
        self.max_pages = max_pages
        self._lock = DeferringLock()
        self._caches: CacheSet | None = None

    def latest(self) -> CacheSet:
        """Return the caches used last without checking that they are still valid."""
        with self._lock:
            self._caches = self._caches or self._empty()
            return self._caches

    def current(self) -> CacheSet:
        """Return the caches if they are still valid, else new and empty ones."""
        model = self.model
        numerics = model.config.attention_numerics
        kernels = (
            {**default_choices_for(model.device, numerics), **explicit_choices()}
            if numerics == "batch_invariant"
            else {}
        )
        versions, numbers = model.parameter_versions(), checksum(leaves(model.params))
        model_state = versions, numbers, model.vila_config, numerics, kernels
        with self._lock:
            caches = self._caches or self._empty()
            if caches.settings != model.config.cache_kwargs() or caches.model_state not in (None, model_state):
                caches = self._empty()
            caches.model_state, self._caches = model_state, caches
            return caches

    def _empty(self) -> CacheSet:
        model = self.model
        return CacheSet(
            model.new_cache(0, max_pages=self.max_pages),
            ImageFeatureCache(model.encode_images),
            model.config.cache_kwargs(),
        )
