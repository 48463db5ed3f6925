"""The sizes of models by name."""

SHAPE = ("n_layer", "n_head", "n_embd")


def presets() -> dict[str, dict[str, int]]:
    """Each preset's n_layer, n_head and n_embd.

    This is the only place in Python that knows them; src/config has the program's own table, which
    analysis/tests/test_presets.py compares with this one.
    """
    # fmt: off
    sizes = {
        "gpt-nano": (3, 3, 48), "gpt-micro": (4, 4, 128), "gpt-mini": (6, 6, 192),
        "gopher-44m": (8, 16, 512), "gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024),
        "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600),
    }
    # fmt: on
    return {name: dict(zip(SHAPE, size)) for name, size in sizes.items()}  # noqa: B905  # Python 3.9
