"""Check the arguments with which vLLM calls a selected kernel. Usage: chosen_kernels.py CHECK

It runs in an environment where the wheel is installed. The card is a pretended card of capability 7.0, and functions
that record their arguments replace the kernels.
"""

import sys

from volta import pretended_gpu


def awq_calls_triton_for_one_token_and_for_many():
    import torch
    from vllm.model_executor.layers.quantization import awq, awq_triton

    calls = []
    awq_triton.awq_gemm_triton = lambda x, qweight, *_: calls.append("gemm") or x.new_zeros(len(x), 8)
    awq_triton.awq_dequantize_triton = lambda qweight, *_: calls.append("dequantize") or torch.zeros(32, 8)
    config = awq.AWQConfig(4, 32, True)
    method, layer = awq.AWQLinearMethod(config), torch.nn.Module()
    method.create_weights(layer, 32, [8], 32, 8, torch.float32, weight_loader=None)
    assert method.apply(layer, torch.zeros(1, 32)).shape == (1, 8)
    assert method.apply(layer, torch.zeros(256, 32)).shape == (256, 8)
    assert calls == ["gemm", "dequantize"], calls


def exllama_has_one_row_of_zero_points_for_weights_per_channel():
    import torch
    from vllm import _custom_ops
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsWNA16

    _custom_ops.gptq_shuffle = lambda *_: None
    scheme, layer = CompressedTensorsWNA16("channel", 4), torch.nn.Module()
    scheme.create_weights(layer, 64, 128, [64], 128, torch.float16, lambda *_: None)
    scheme.process_weights_after_loading(layer)
    assert layer.qzeros.shape == (1, 64 // 8), layer.qzeros.shape
    assert layer.qzeros.unique().tolist() == [0x77777777], "8 less the one that the kernel adds"


if __name__ == "__main__":
    pretended_gpu.capability()
    import vllm.model_executor.parameter as parameter

    # There is one card and no process group.
    parameter.get_tensor_model_parallel_rank, parameter.get_tensor_model_parallel_world_size = lambda: 0, lambda: 1
    globals()[sys.argv[1]]()
