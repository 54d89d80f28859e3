"""Faults planted in compiled kernels are found; `bench.ptx_mutants` plants more of them, in more kernels."""

import pytest

from bench.ptx_mutants.cases import Case, cases_for
from bench.ptx_mutants.run import CRASHED, DISPUTED, FOUND, MISSED, Subject
from vila_triton.registry import discover

CODES = {"other codes of a word", "codes of a word swapped"}
SELECTED = {  # case -> faults: of barriers, waits and fences all, of others up to the first that is found
    "rms_norm-triton-0-sm_80-bfloat16": {"barrier dropped"},
    "int4_matmul-splitk-0-sm_80-bfloat16": {"barrier dropped", "order of a count dropped", "bound off by one", *CODES},
    "int4_matmul-splitk-0-sm_80-float32": {"weight in 16 bits"},
    "linear-triton-0-sm_80-bfloat16": {"wait for copies dropped"},
    "linear-triton-0-sm_90-bfloat16": {"barrier dropped", "wait for products dropped", "proxy fence dropped"},
}


def selected_cases() -> list[Case]:
    return [case for target in ("sm_80", "sm_90") for case in cases_for(target) if case.name in SELECTED]


@pytest.mark.parametrize("case", selected_cases(), ids=lambda case: case.name)
def test_faults_planted_in_a_kernel_are_found(case: Case) -> None:
    discover()
    subject, outcomes = Subject(case), []
    for edit, ran in subject.edits():
        known = [x for x in outcomes if x.rule == edit.rule.name and x.verdict == FOUND]
        if edit.rule.name in SELECTED[case.name] and (edit.rule.orders or not known):
            outcomes.append(subject.plant(edit, ran))
    assert {x.rule for x in outcomes if x.verdict == FOUND} == SELECTED[case.name]
    assert not [x for x in outcomes if x.verdict in (CRASHED, DISPUTED, MISSED)]
