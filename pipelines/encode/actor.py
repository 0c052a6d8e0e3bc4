"""Shared by the actors of text embeddings and of latents: configuration, storage, and the driver's fingerprint."""

from typing import Any

from pipelines.config import EncodeConfig
from pipelines.dataset.storage import Storage
from pipelines.units.actor import UnitActor


class EncodeActor(UnitActor):
    """A `UnitActor` of encode; a subclass defines what it writes, and with which model.

    Args:
        config: The section `encode`.
        storage: The storage of pairs and shards.
        fingerprint: Fingerprint of the model and the settings, from the driver.
        num_threads: Number of torch threads.
        attempts: From `new_attempts`.
    """

    way_out = (
        "did they run out of memory? lower `encode.batch_size` or use nodes with more memory; finished work is kept"
    )

    def __init__(
        self, config: EncodeConfig, storage: Storage, fingerprint: str, num_threads: int, attempts: Any
    ) -> None:
        super().__init__(attempts)
        self._config, self._storage, self._fingerprint = config, storage, fingerprint
        self._num_threads = num_threads
