"""Download FineWeb's sample of 100B tokens, already tokenized for GPT-2, from the Hugging Face hub.

    python data/cached_fineweb100B.py 30      # the validation shard and the first 30 training shards
    python data/cached_fineweb100B.py         # all 1030 of them, 206 GB

Shards of 100M tokens (200 MB) go to data/fineweb100B/.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also under PYTHONSAFEPATH=1

from data.hub import PublicShards, download_main
from data.shards import run_script

SHARDS = PublicShards("kjj0/fineweb100B-gpt2", folder="fineweb100B", prefix="fineweb", num_train=1030)

if __name__ == "__main__":
    sys.exit(run_script(lambda: download_main(__doc__, SHARDS)))
