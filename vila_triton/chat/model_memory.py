"""What a model remembers of conversations: pages and picture features, as long as it would compute them again."""

from dataclasses import dataclass
from typing import Any

from ..cache.paged_cache import PagedCache
from ..hf.modeling_vila_llama import VilaLlamaForCausalLM
from ..images.feature_cache import Pictures
from ..lock import Lock
from ..models.params import checksum, written
from ..registry import explicit
from ..registry.tuned_tables import kernels_for


@dataclass
class Known:
    """What was computed with the same settings of the cache and, from the first time on, the same `eyes`: all that
    picture features depend on.
    """

    cache: PagedCache
    pictures: Pictures
    settings: dict[str, Any]
    eyes: tuple | None = None


class Memory:
    """Pages of all conversations, which share those of what they have in common, and features of the pictures asked
    about lately. `limit`: how many pages there may be.

    All is forgotten when it would come out otherwise: after a parameter was replaced or written to, in whatever way,
    and when the config's policy, kv_dtype or page_size change; under the policy "invariant", where every bit counts,
    also when `use` says something else. To see that takes as long as reading all parameters twice, about two tokens.
    """

    def __init__(self, model: VilaLlamaForCausalLM, limit: int | None = None):
        self.model = model
        self.limit = limit
        self._lock = Lock()
        self._known: Known | None = None

    def latest(self) -> Known:
        """What was remembered last, whether or not it still holds."""
        with self._lock:
            self._known = self._known or self._empty()
            return self._known

    def holding(self) -> Known:
        """What is remembered and holds."""
        model, parameters = self.model, list(self.model.parameters())
        policy = model.config.attention_policy
        kernels = {**kernels_for(model.device, policy), **explicit()} if policy == "invariant" else {}
        eyes = written(parameters), checksum(parameters), model.geometry, policy, kernels
        with self._lock:
            known = self._known or self._empty()
            if known.settings != model.config.cache() or known.eyes not in (None, eyes):
                known = self._empty()
            known.eyes, self._known = eyes, known
            return known

    def _empty(self) -> Known:
        model = self.model
        return Known(model.new_cache(0, limit=self.limit), Pictures(model.encode_images), model.config.cache())
