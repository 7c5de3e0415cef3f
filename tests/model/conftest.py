"""What the tests of the model room share: the reference body, and the default model, converted once."""

from __future__ import annotations

from pathlib import Path

import pytest

from infinillm.errors import BadRequest
from infinillm.kernels import reference
from infinillm.model.files import resolve
from tests import tiny


@pytest.fixture(scope="session")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the default model, freshly converted."""
    try:
        return resolve(None, tmp_path_factory.mktemp("cache"), tiny.silent)
    except BadRequest as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def body() -> object:
    return reference
