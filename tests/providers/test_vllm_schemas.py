"""The stand-ins' schemas are those that vLLM 0.26.0's libraries registered on a GPU, as a file here holds them."""

from pathlib import Path

import pytest
from vllm_stand_in import CUTLASS, CUTLASS_MOE, MARLIN, MOE, MOE_STEPS, QUTLASS, parsed, same

RECORD = Path(__file__).parent / "vllm-0.26.0-schemas.txt"


def recorded():
    lines = [line for line in RECORD.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return {line.partition("(")[0]: line.partition("::")[2] for line in lines}


FAMILIES = (("_C", (*MARLIN["0.26.0"], *CUTLASS, *CUTLASS_MOE, *MOE_STEPS)), ("_moe_C", MOE), ("_qutlass_C", QUTLASS["0.26.0"]))
SCHEMAS = [(space, schema) for space, schemas in FAMILIES for schema in schemas]


@pytest.mark.parametrize(("space", "schema"), SCHEMAS, ids=lambda value: value.partition("(")[0])
def test_a_stand_in_has_the_schema_of_the_real_operator(space, schema):
    real = recorded()[f"{space}::{schema.partition('(')[0]}"]
    assert same(parsed(real), parsed(schema))


@pytest.mark.parametrize(
    ("before", "after"), [("Tensor A", "Tensor? A"), ("Tensor A", "Tensor a"), ("Tensor A, ", ""), (" -> Tensor", " -> ()")]
)
def test_another_schema_is_told_from_it(before, after):
    schema = QUTLASS["0.26.0"][0]
    assert not same(parsed(schema), parsed(schema.replace(before, after)))
