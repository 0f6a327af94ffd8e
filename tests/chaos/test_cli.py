from __future__ import annotations

import pytest
from typer.testing import CliRunner

from hycluster.cli import app
from hycluster.errors import SettingsError


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--faults", "murder"], "--faults: 'murder' is not allowed; must be NAME or NAME=WEIGHT"),
        (["--targets", "replica=0"], "--targets: 'replica=0'"),
        (["--every", "sometimes"], "--every: 'sometimes' is not allowed; must be 'whole', or seconds"),
        (["--together", "2", "--targets", "ingress"], "--together: 2 is without effect"),
        (["--prompt-tokens", "9-3"], "--prompt-tokens: '9-3' is not allowed; must be FROM-TO in tokens"),
        (["--output-tokens", "0"], "--output-tokens: '0'"),
        (["--ingress", "https"], "--ingress: 'https' is not allowed; must be of http, grpc"),
        (["--ingress", ","], "--ingress: must name one or more"),
        (["--leave-out", "seeds"], "--leave-out: 'seeds'"),
        (["--http", "localhost:8000"], "--http: 'localhost:8000' is not allowed; must begin with http"),
        (["--address", "127.0.0.1:1"], "--address: no Ray cluster at '127.0.0.1:1'"),
    ],
)
def test_wrong_use_is_refused_before_anything_is_hit(arguments: list[str], says: str) -> None:
    done = CliRunner().invoke(app, ["chaos", *arguments])
    assert isinstance(done.exception, SettingsError)
    assert says in done.exception.message
    assert done.exception.exit_code == 2
