"""Download FineWeb-Edu's sample of 10B tokens, already tokenized for GPT-2, from the Hugging Face hub.

    python data/cached_finewebedu10B.py 9       # the validation shard and the first 9 training shards
    python data/cached_finewebedu10B.py         # all 99 of them, 19.9 GB

Shards of 100M tokens (200 MB) go to data/finewebedu10B/.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also under PYTHONSAFEPATH=1

from data.hub import PublicShards, download_main
from data.shards import run_script

SHARDS = PublicShards("kjj0/finewebedu10B-gpt2", folder="finewebedu10B", prefix="finewebedu", num_train=99)

if __name__ == "__main__":
    sys.exit(run_script(lambda: download_main(__doc__, SHARDS)))
