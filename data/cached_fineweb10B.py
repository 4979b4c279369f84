"""Download FineWeb's sample of 10B tokens, already tokenized for GPT-2, from the Hugging Face hub.

    python data/cached_fineweb10B.py 9       # the validation shard and the first 9 training shards
    python data/cached_fineweb10B.py         # all 103 of them, 20.6 GB

Shards of 100M tokens (200 MB) go to data/fineweb10B/.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also under PYTHONSAFEPATH=1

from data.hub import PublicShards, download_main
from data.shards import run_script

SHARDS = PublicShards("kjj0/fineweb10B-gpt2", folder="fineweb10B", prefix="fineweb", num_train=103)

if __name__ == "__main__":
    sys.exit(run_script(lambda: download_main(__doc__, SHARDS)))
