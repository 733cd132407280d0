"""Runs one check inside an environment where the wheel is installed, on a machine without a GPU.

The platform is a pretended one: CUDA, capability 7.0, no device behind it. That is enough for what vLLM decides
and imports; no kernel is run. Usage: python pretended_volta.py CHECK
"""

import sys

from volta import pretended_gpu

import torch  # isort: skip - after pretended_gpu, which sets the environment


def refusal(call):
    # vLLM refuses a choice with ValueError; our patches refuse a call with NotImplementedError.
    try:
        call()
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return "nothing: it went through"


def the_worker_and_the_server_import():
    import vllm.entrypoints.openai.api_server
    import vllm.v1.worker.gpu_model_runner
    import vllm.v1.worker.gpu_worker  # noqa: F401

    assert not {"flashinfer", "ray", "torchaudio", "vllm.vllm_flash_attn.layers"} & set(sys.modules)


def attention_is_tritons_and_flash_attention_is_refused_in_words():
    from vllm.attention.backends.registry import AttentionBackendEnum

    def chosen(wish):
        return pretended_gpu.Platform.get_attn_backend_cls(wish, 128, torch.float16, "auto", None, False, False, False)

    assert "TritonAttentionBackend" in chosen(None)
    said = refusal(lambda: chosen(AttentionBackendEnum.FLASH_ATTN))
    assert "FlashAttention is not in this build" in said, said


def rotary_embedding_turns_by_the_angle():
    from vllm.model_executor.layers.rotary_embedding.common import apply_rotary_emb

    heads, angle = torch.randn(1, 5, 3, 8), torch.randn(5, 4)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    halves = torch.complex(heads[..., :4], heads[..., 4:]) * turn
    torch.testing.assert_close(
        apply_rotary_emb(heads, angle.cos(), angle.sin()), torch.cat((halves.real, halves.imag), -1)
    )
    pairs = torch.view_as_complex(heads.unflatten(-1, (4, 2))) * turn
    expected = torch.view_as_real(pairs).flatten(-2)
    torch.testing.assert_close(apply_rotary_emb(heads, angle.cos(), angle.sin(), True), expected)


def dropped_kernels_say_that_they_were_dropped():
    import inspect

    import vllm._custom_ops as ops

    for function in (ops.paged_attention_v1, ops.paged_attention_v2):
        values = [None] * len(inspect.signature(function).parameters)
        said = refusal(lambda function=function, values=values: function(*values))
        assert "is not in this build" in said, said


def the_command_line_says_its_version():
    from vllm.entrypoints.cli.main import main

    sys.argv = ["vllm", "--version"]
    main()


def the_command_line_explains_itself():
    from vllm.entrypoints.cli.main import main

    sys.argv = ["vllm", "serve", "--help"]
    main()


if __name__ == "__main__":
    pretended_gpu.capability()
    globals()[sys.argv[1]]()
