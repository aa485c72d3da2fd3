"""all_gatherv and reduce_scatterv for vLLM's CpuCommunicator, over torch.distributed.

Without them a MoE model with several data-parallel ranks fails on CPU at the first request. vLLM loads this in every
process, its workers included. Plain and slow: pad to the longest and all-gather; all-reduce and take one's own slice.
"""


def register() -> None:
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    for method in (all_gatherv, reduce_scatterv):
        if method.__name__ not in vars(CpuCommunicator):
            setattr(CpuCommunicator, method.__name__, method)


def all_gatherv(self, input_, dim=0, sizes=None):
    """The ranks' tensors one after another along `dim`; `sizes`: each rank's length there, None if all are the same."""
    import torch

    if isinstance(input_, list):
        return [all_gatherv(self, one, dim, sizes) for one in input_]
    moved = input_.movedim(dim, 0)
    lengths = sizes or [moved.shape[0]] * self.world_size
    padded = moved.new_zeros((max(lengths), *moved.shape[1:]))
    padded[: moved.shape[0]] = moved
    parts = [torch.empty_like(padded) for _ in lengths]
    torch.distributed.all_gather(parts, padded, group=self.device_group)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)]).movedim(0, dim)


def reduce_scatterv(self, input_, dim=-1, sizes=None):
    """This rank's slice along `dim` of the ranks' sum; `sizes`: each rank's length, None if all are the same."""
    import torch

    moved = input_.movedim(dim, 0).contiguous()
    lengths = sizes or [moved.shape[0] // self.world_size] * self.world_size
    torch.distributed.all_reduce(moved, group=self.device_group)
    begin = sum(lengths[: self.rank_in_group])
    return moved[begin : begin + lengths[self.rank_in_group]].movedim(0, dim).contiguous()
