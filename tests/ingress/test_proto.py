"""The checked-in code of the gRPC ingress is what its .proto gives, and its words are those of the house."""

from __future__ import annotations

import subprocess
from dataclasses import fields
from pathlib import Path

from google.protobuf import descriptor_pb2, descriptor_pool

from hycluster import core
from hycluster.ingress.proto import inference_pb2 as pb

ROOT = Path(__file__).parents[2]
PROTO = Path("hycluster/ingress/proto")


def generated(folder: Path) -> Path:
    done = subprocess.run([ROOT / "scripts/gen_proto.sh", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / PROTO


def described(path: Path) -> descriptor_pb2.FileDescriptorProto:
    """The descriptor in a generated module, read without importing a second copy of it."""
    line = next(line for line in path.read_text().splitlines() if line.startswith("DESCRIPTOR = "))
    serialized = eval(line.removeprefix("DESCRIPTOR = _descriptor_pool.Default().AddSerializedFile"))
    return descriptor_pb2.FileDescriptorProto.FromString(serialized)


def code(path: Path) -> list[str]:
    """The lines that do not depend on the generator's version."""
    return [line for line in path.read_text().splitlines() if "GENERATED_VERSION = " not in line]


def test_checked_in_code_is_up_to_date(tmp_path: Path) -> None:
    fresh = generated(tmp_path)
    assert described(ROOT / PROTO / "inference_pb2.py") == described(fresh / "inference_pb2.py")
    for name in ("inference_pb2_grpc.py", "inference_pb2.pyi", "inference_pb2_grpc.pyi"):
        assert code(ROOT / PROTO / name) == code(fresh / name), f"{name} is stale: run scripts/gen_proto.sh"


def test_loaded_descriptor_is_the_checked_in_one() -> None:
    loaded = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(loaded)
    assert loaded == described(ROOT / PROTO / "inference_pb2.py")


def test_sampling_has_the_fields_of_the_dataclass() -> None:
    assert [field.name for field in pb.Sampling.DESCRIPTOR.fields] == [field.name for field in fields(core.Sampling)]


def test_a_request_has_the_fields_of_the_dataclass() -> None:
    assert set(pb.GenerateRequest.DESCRIPTOR.fields_by_name) == {field.name for field in fields(core.GenerationRequest)}
    (forms,) = pb.StructuredOutput.DESCRIPTOR.oneofs
    assert {field.name for field in forms.fields} == {field.name for field in fields(core.StructuredOutput)}


def test_sampling_tells_unset_from_zero() -> None:
    for field in pb.Sampling.DESCRIPTOR.fields:
        assert field.has_presence or field.is_repeated, field.name


def test_priorities_have_the_names_of_the_house() -> None:
    assert set(pb.Priority.keys()) == {priority.name for priority in core.Priority}
    assert pb.GenerateRequest().priority == pb.ONLINE


def test_contract_names() -> None:
    pool = descriptor_pool.Default()
    service = pool.FindServiceByName("hycluster.v1.Inference")
    names = {"Generate", "GenerateStream", "Tokenize", "CountTokens", "ListModels"}
    assert {method.name for method in service.methods} == names
    streams = {method.name for method in service.methods if method.server_streaming}
    assert streams == {"GenerateStream"}
    assert not any(method.client_streaming for method in service.methods)
    one_of = pb.GenerateRequest.DESCRIPTOR.oneofs_by_name["input"]
    assert [field.name for field in one_of.fields] == ["prompt", "messages", "token_ids"]
    assert {"model", "sampling", "priority", "request_id", "session_id"} < set(
        pb.GenerateRequest.DESCRIPTOR.fields_by_name
    )
    assert {"index", "text", "token_ids", "finish_reason", "logprobs"} < set(pb.Output.DESCRIPTOR.fields_by_name)
    assert {"index", "text", "token_ids", "finish_reason", "usage"} < set(pb.GenerateChunk.DESCRIPTOR.fields_by_name)
