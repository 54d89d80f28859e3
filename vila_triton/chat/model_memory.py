"""What a model remembers of conversations: pages and picture features, as long as it would compute them again."""

from dataclasses import dataclass
from typing import Any

from ..cache.paged_cache import PagedKVCache
from ..hf.modeling_vila_llama import VilaLlamaForCausalLM
from ..images.feature_cache import ImageFeatureCache
from ..lock import DeferringLock
from ..models.params import checksum, write_counts
from ..registry import explicit_choices
from ..registry.tuned_tables import default_choices_for


@dataclass
class CacheSet:
    """What was computed with the same settings of the cache and, from the first time on, the same `eyes`: all that
    picture features depend on.
    """

    cache: PagedKVCache
    feature_cache: ImageFeatureCache
    settings: dict[str, Any]
    model_state: tuple | None = None


class SharedCaches:
    """Pages of all conversations, which share those of what they have in common, and features of the pictures asked
    about lately. `limit`: how many pages there may be.

    All is forgotten when it would come out otherwise: after a parameter was replaced or written to, in whatever way,
    and when the config's policy, kv_dtype or page_size change; under the policy "invariant", where every bit counts,
    also when `use` says something else. To see that takes as long as reading all parameters twice, about two tokens.
    """

    def __init__(self, model: VilaLlamaForCausalLM, max_pages: int | None = None):
        self.model = model
        self.max_pages = max_pages
        self._lock = DeferringLock()
        self._caches: CacheSet | None = None

    def latest(self) -> CacheSet:
        """What was remembered last, whether or not it still holds."""
        with self._lock:
            self._caches = self._caches or self._empty()
            return self._caches

    def current(self) -> CacheSet:
        """What is remembered and holds."""
        model, parameters = self.model, list(self.model.parameters())
        numerics = model.config.attention_policy
        kernels = (
            {**default_choices_for(model.device, numerics), **explicit_choices()} if numerics == "invariant" else {}
        )
        model_state = write_counts(parameters), checksum(parameters), model.vila_config, numerics, kernels
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
