"""The tests are a package so that ranks launched by torchrun can be started as `-m tests.checked`."""
