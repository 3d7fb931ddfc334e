"""With vLLM's real libraries: the schemas that they register are those that the stand-ins have, and so what is called.

Needs a GPU's driver, which the libraries are linked to, and not the GPU that a kernel was built for.
"""

import pytest
from vllm_stand_in import CUTLASS, CUTLASS_MOE, MARLIN, MOE, MOE_STEPS, QUTLASS, parsed, same

from fp4bench.providers import vllm_ops

_FAMILIES = [
    ("MAIN", MARLIN),
    ("MAIN", CUTLASS),
    ("MAIN", MOE_STEPS),
    ("MAIN", CUTLASS_MOE),
    ("MOE", MOE),
    ("QUTLASS", QUTLASS),
]

# The version whose schemas a version of vLLM has, as far as it is known.
_OF = {"0.20": "0.26.0", "0.26": "0.26.0", "0.33": "0.33.0"}
_LACKS = {"0.20": ("mxfp4_experts_quant_supported",)}


def registered(operators, schema):
    """The schema that a library registered for an operator, or None; loads the libraries."""
    name = schema.partition("(")[0]
    base, _, overload = name.partition(".")
    found = operators._find(base)
    return None if found is None else getattr(found, overload or "default")._schema


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "schemas"), _FAMILIES, ids=str)
def test_the_real_schemas_are_those_of_the_stand_ins(family, schemas):
    operators = getattr(vllm_ops, family)
    version = operators.version()
    if version is None:
        pytest.skip("vLLM's libraries are not here")
    short = ".".join(version.split(" ")[0].split(".")[:2])
    if short not in _OF:
        pytest.skip(f"the schemas of vLLM {short} are not written down")
    for schema in schemas[_OF[short]] if isinstance(schemas, dict) else schemas:
        real = registered(operators, schema)
        if schema.partition("(")[0] in _LACKS.get(short, ()):
            assert real is None, schema
            continue
        assert real is not None, schema
        assert same(real, parsed(schema)), f"{real} is not {schema}"
