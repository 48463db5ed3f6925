"""The page on a GPU's step has the tables that the formulas make; test_emulated_gpu.py counts."""

from pathlib import Path

import gpu_step

PAGE = Path(__file__).resolve().parents[2] / "docs/gpu-step.md"


def test_the_page_has_the_table_of_the_formulas():
    assert gpu_step.table(gpu_step.GPT2) in PAGE.read_text()


def test_parameters_are_gpt2s():
    assert gpu_step.GPT2.parameters == 124_439_808
