from __future__ import annotations

import sys

import pytest

from hycluster.errors import SettingsError
from hycluster.replica.rank import start_engine
from hycluster.settings.model import Model


def test_what_is_wrong_with_the_files_is_said_before_vllm_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    # Whoever imports it now gets an ImportError.
    monkeypatch.setitem(sys.modules, "hycluster.engine.vllm", None)
    with pytest.raises(SettingsError, match="'/no/such/folder': no such folder"):
        start_engine(Model(name="m", source="/no/such/folder"))
