"""Programs shaped like decoders at full size: data for planning only, nothing here is computed."""

from memsched.machine import DEVICE, HOST, NVME, Compute, Link, Machine, Tier
from memsched.program import ArraySpec, Kind, Program, Step

LARGEST = 1 << 40


def decoder(
    *, layers: int = 28, head_blocks: int = 8, tokens: int = 1, with_head: bool = True
) -> Program:
    """The 2B text model: 11 weights of 100.7 MB per layer, a head of 622 MB in row blocks."""
    hidden, inner, heads = 2048, 6144, 1024
    arrays: dict[str, ArraySpec] = {}
    steps: list[Step] = []

    def new(name: str, kind: Kind, *shape: int) -> str:
        arrays[name] = ArraySpec(name, shape, "bfloat16", kind)
        return name

    def flops(weights: tuple[str, ...]) -> int:
        return tokens * sum(arrays[name].nbytes for name in weights)

    state = new("x", "embedding", tokens, hidden)
    shapes = {"norm1": (hidden,), "q": (hidden, hidden), "k": (heads, hidden), "v": (heads, hidden)}
    shapes |= {"q_norm": (128,), "k_norm": (128,), "o": (hidden, hidden), "norm2": (hidden,)}
    shapes |= {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    for layer in range(layers):
        weights = tuple(new(f"{layer}.{key}", "weight", *shape) for key, shape in shapes.items())
        caches = tuple(new(f"{layer}.{key}_cache", "cache", 512, heads) for key in ("k", "v"))
        after = new(f"h{layer}", "activation", tokens, hidden)
        workspace_bytes = 100_000 + 8 * inner * tokens
        steps.append(
            Step(
                f"layer{layer}",
                "layer",
                (state, *weights),
                (after,),
                caches,
                flops(weights),
                workspace_bytes,
            )
        )
        state = after
    outputs = [state]
    if with_head:
        parts = []
        for block in range(head_blocks):
            weight = new(f"head.{block}", "weight", 151_936 // head_blocks, hidden)
            parts.append(new(f"part{block}", "activation", 151_936 // head_blocks))
            steps.append(
                Step(f"head{block}", "head", (state, weight), (parts[-1],), (), flops((weight,)))
            )
        outputs = [new("logits", "activation", 151_936)]
        steps.append(Step("join", "join", tuple(parts), tuple(outputs)))
    caches = tuple(name for name, spec in arrays.items() if spec.kind == "cache")
    return Program(arrays, tuple(steps), (*outputs, *caches))


def tower(*, layers: int = 24, patches: int = 784) -> Program:
    """A vision tower of 302 MB whose compute takes longer than its transfer."""
    width, inner = 1024, 4096
    arrays = {"pixels": ArraySpec("pixels", (patches, width), "bfloat16", "input")}
    steps, state = [], "pixels"
    shapes = {
        "qkv": (3 * width, width),
        "o": (width, width),
        "up": (inner, width),
        "down": (width, inner),
    }
    for layer in range(layers):
        names = tuple(f"tower.{layer}.{key}" for key in shapes)
        for name, shape in zip(names, shapes.values(), strict=True):
            arrays[name] = ArraySpec(name, shape, "bfloat16", "weight")
        after = f"tower.h{layer}"
        arrays[after] = ArraySpec(after, (patches, width), "bfloat16", "activation")
        flops = patches * sum(arrays[name].nbytes for name in names)
        steps.append(
            Step(after, "block", (state, *names), (after,), (), flops, 64 * patches * patches)
        )
        state = after
    return Program(arrays, tuple(steps), (state,))


def experts(*, layers: int = 94, each: int = 128) -> Program:
    """A mixture of experts with one pair of arrays per expert: 24,000 weights, 456 GB."""
    hidden, inner = 4096, 1536
    arrays = {"x": ArraySpec("x", (1, hidden), "bfloat16", "embedding")}
    steps, state = [], "x"
    for layer in range(layers):
        attention = tuple(f"{layer}.{key}" for key in "qkvo")
        pairs = tuple(f"{layer}.{expert}.{key}" for expert in range(each) for key in ("up", "down"))
        for name in attention:
            arrays[name] = ArraySpec(name, (4096, hidden), "bfloat16", "weight")
        for name in pairs:
            rows = 2 * inner if name.endswith("up") else inner
            arrays[name] = ArraySpec(name, (rows, hidden), "bfloat16", "weight")
        for after, weights in ((f"a{layer}", attention), (f"h{layer}", pairs)):
            arrays[after] = ArraySpec(after, (1, hidden), "bfloat16", "activation")
            steps.append(Step(after, "step", (state, *weights), (after,), (), 10**9))
            state = after
    return Program(arrays, tuple(steps), (state,))


def computer(
    *, device: int, host: int | None = None, disk_bytes_per_s: float = 1e9, largest: int = LARGEST
) -> Machine:
    """A computer that reads weights at 20 GB/s; with `host` it has a card on a 6 GB/s bus."""
    rates = {(NVME, DEVICE): disk_bytes_per_s}
    tiers = [Tier(DEVICE, device, largest)]
    if host is not None:
        rates = {(NVME, HOST): disk_bytes_per_s, (HOST, DEVICE): 6e9}
        tiers.append(Tier(HOST, host, largest))
    links = tuple(
        Link(*ends, bytes_per_s=rate, latency_s=1e-4)
        for pair, rate in rates.items()
        for ends in (pair, pair[::-1])
    )
    tiers.append(Tier(NVME, LARGEST, LARGEST))
    compute = Compute(flops_per_s=200e9, bytes_per_s=20e9)
    return Machine("computer", "cpu", tuple(tiers), links, compute)
