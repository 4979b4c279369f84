"""Batches made by a thread while the device computes."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without blocking the host, which a copy from pageable memory would do."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


class Prefetcher:
    """Makes items in a background thread: batches (named tuples of tensors and numbers) or lists of them.

    On CUDA the copies go through a stream of their own; take() makes the device wait for them, not the host.
    """

    def __init__(self, device: torch.device):
        self.device, self.worker = device, ThreadPoolExecutor(1)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, make, *args) -> Future:
        """Begin make(*args); take() returns its result."""
        return self.worker.submit(self.run, make, args)

    def run(self, make, args):
        if self.stream is None:
            return make(*args), None
        # a new thread starts on device 0 and its default stream
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            return make(*args), self.stream.record_event()

    def take(self, future: Future):
        """Wait for an item and make it usable on the current stream."""
        item, copied = future.result()
        if item is not None and copied is not None:
            computing = torch.cuda.current_stream(self.device)
            computing.wait_event(copied)
            batches = item if isinstance(item, list) else [item]
            for batch in batches:
                for x in batch:
                    if isinstance(x, Tensor):
                        x.record_stream(computing)  # the copying stream, its owner, must not reuse it early
        return item

    def each(self, items):
        """Yield the items of an iterator, each made while the one before it is in use."""
        items = iter(items)
        item = self.take(self.start(next, items, None))
        while item is not None:
            coming = self.start(next, items, None)
            yield item
            item = self.take(coming)

    def close(self):
        self.worker.shutdown()
