"""Times one neural-tangents kernel. Run by `benchmarks.kernel` with the interpreter that has the package; needs no torch.

Reads ``{"shape": …, "batch": …, "layers": …, "implementation": …, "repeats": …}`` as its argument and prints
``{"seconds": …, "bytes": …}``.
"""

import json
import resource
import statistics
import sys
import time
from typing import Any


def main() -> None:
    """Measure and print."""
    job = json.loads(sys.argv[1])
    import jax
    import neural_tangents as nt
    from jax.example_libraries import stax

    def layer(spec: Any) -> Any:
        if spec == "tanh":
            return stax.Tanh
        if spec == "relu":
            return stax.Relu
        if spec == "flatten":
            return stax.Flatten
        if spec == "pool":
            return stax.AvgPool((2, 2), strides=(2, 2))
        kind, units = spec
        return stax.Dense(units) if kind == "dense" else stax.Conv(units, (3, 3), padding="SAME")

    initialize, apply = stax.serial(*[layer(spec) for spec in job["layers"]])
    shape = tuple(job["shape"])
    if len(shape) == 3:
        shape = (*shape[1:], shape[0])  # channels last
    key = jax.random.PRNGKey(0)
    _, parameters = initialize(key, (-1, *shape))
    x = jax.random.normal(key, (job["batch"], *shape))
    implementation = nt.NtkImplementation[job["implementation"]]
    kernel = jax.jit(nt.empirical_ntk_fn(apply, trace_axes=(), vmap_axes=0, implementation=implementation))
    apply(parameters, x).block_until_ready()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kernel(x, None, parameters).block_until_ready()  # compiles
    seconds: list[float] = []
    begin = time.perf_counter()
    while len(seconds) < job["repeats"] and (len(seconds) < 1 or time.perf_counter() - begin < job["patience"]):
        start = time.perf_counter()
        kernel(x, None, parameters).block_until_ready()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": statistics.median(seconds), "bytes": (peak - before) * 1024}))


if __name__ == "__main__":
    main()
