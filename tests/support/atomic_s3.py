"""moto's S3 server, with conditional writes as atomic as those of S3: moto checks first and writes later.

Without this, of eight writers at once on a busy machine one lost a commit that had been confirmed.
"""

import sys
import threading
from typing import Any

from moto.s3.responses import S3Response
from moto.server import main

lock = threading.Lock()
put_object = S3Response.put_object


def put_one_at_a_time(self: S3Response) -> Any:
    with lock:
        return put_object(self)


if __name__ == "__main__":
    S3Response.put_object = put_one_at_a_time  # type: ignore[method-assign]
    main(sys.argv[1:])
