"""What the actors of text embeddings and of latents share: a configuration, a storage, and the driver's fingerprint."""

from typing import Any

from pipelines.config import EncodeConfig
from pipelines.dataset.storage import Storage
from pipelines.units.actor import UnitActor


class EncodeActor(UnitActor):
    """A `UnitActor` of encode; a subclass says what it writes and with what.

    Args:
        config: What to write.
        storage: Where pairs are and shards go.
        fingerprint: Of the model and the settings, as the driver has it.
        num_threads: Threads of torch.
        attempts: From `new_attempts`.
    """

    way_out = "did they run out of memory? lower `encode.batch_size`, or give the nodes more; finished work stays"

    def __init__(
        self, config: EncodeConfig, storage: Storage, fingerprint: str, num_threads: int, attempts: Any
    ) -> None:
        super().__init__(attempts)
        self._config, self._storage, self._fingerprint = config, storage, fingerprint
        self._num_threads = num_threads
