"""Commands about models and engines: pull, list, calibrate, install."""
