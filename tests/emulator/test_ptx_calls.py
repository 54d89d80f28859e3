"""Functions of a PTX text are read where they are called: parameters, results, registers, returns, pointers."""

import numpy as np
import pytest
from ptx_runner import run_ptx

from bench.emulator.program.ptx import UnknownPTX

FUNCTIONS = """
.func (.param .b32 func_retval0) doubled(.param .b32 doubled_param_0);
.func (.param .b32 func_retval0) doubled(
    .param .b32 doubled_param_0
)
{
    .reg .b32 %r<3>;
    ld.param.b32 %r0, [doubled_param_0];
    add.u32 %r2, %r0, %r0;
    st.param.b32 [func_retval0+0], %r2;
    ret;
}
.func (.param .b32 func_retval0) chosen(.param .b32 chosen_param_0, .param .b64 chosen_param_1)
{
    .reg .pred %p<2>;
    .reg .b32 %r<9>;
    .reg .b64 %rd<2>;
    ld.param.b32 %r1, [chosen_param_0];
    ld.param.b64 %rd1, [chosen_param_1];
    setp.lt.u32 %p1, %r1, 5;
    st.b32 [%rd1], 100;
    st.param.b32 [func_retval0], %r1;
    @%p1 ret;
    {
        .param .b32 param0;
        st.param.b32 [param0], %r1;
        .param .b32 retval0;
        call.uni (retval0), doubled, (param0);
        ld.param.b32 %r2, [retval0];
    }
    st.b32 [%rd1], %r2;
    st.param.b32 [func_retval0], %r2;
    ret;
}
"""
BODY = """
    .local .align 4 .b8 room[4];
    .reg .b64 %generic;
    mov.u64 %q5, room;
    cvta.local.u64 %generic, %q5;
    {
        .param .b32 param0;
        .param .b64 param1;
        .param .b32 retval0;
        st.param.b32 [param0], %r0;
        st.param.b64 [param1], %generic;
        call.uni (retval0), chosen, (param0, param1);
        ld.param.b32 %r2, [retval0];
    }
    ld.local.b32 %r3, [%q5];
    mad.lo.u32 %r4, %r3, 1000, %r2;
    mad.wide.u32 %q6, %r0, 4, %q0;
    st.b32 [%q6], %r4;
"""


def test_functions_return_their_results_and_write_through_pointers() -> None:
    out = np.zeros(32, np.uint32)
    launch = run_ptx(BODY, out, declarations=FUNCTIONS)
    assert not launch.faults
    thread = np.arange(32)
    assert (out == np.where(thread < 5, 100_000 + thread, 2000 * thread + 2 * thread)).all()


@pytest.mark.parametrize("name", ["vprintf", "doubled"], ids=["without a body", "that calls itself"])
def test_a_function_is_refused(name: str) -> None:
    code = f"{{ .param .b32 param0; .param .b32 retval0; call.uni (retval0), {name}, (param0); }}"
    functions = FUNCTIONS.replace("add.u32 %r2, %r0, %r0;", code)
    with pytest.raises(UnknownPTX, match=rf"not emulated: call.uni .*{name}"):
        run_ptx(BODY, np.zeros(32, np.uint32), declarations=functions)
