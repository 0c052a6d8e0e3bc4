"""What this process says while Ray Data works."""

import importlib
import logging

from pipelines.progress import quiet_ray_data


def test_ray_data_is_quiet_on_the_console_and_handlers_of_others_go_on() -> None:
    importlib.import_module("ray.data")  # adds its own handlers
    log = logging.getLogger("ray.data")
    own = [handler for handler in log.handlers if type(handler).__module__.startswith("ray.")]
    of_user = logging.StreamHandler()
    log.addHandler(of_user)
    try:
        quiet_ray_data()
    finally:
        log.removeHandler(of_user)
    assert of_user.level == logging.NOTSET
    consoles = [handler for handler in own if isinstance(handler, logging.StreamHandler)]
    assert consoles
    assert all(handler.level > logging.CRITICAL for handler in consoles)
