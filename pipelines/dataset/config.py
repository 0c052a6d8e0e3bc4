"""The base of every configuration section: frozen, typed, and strict about its keys."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A configuration section. Unknown keys are errors; a default lives on its field and nowhere else."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())
