"""One adapter per array library; :mod:`anyattn.api` imports the one the caller's arrays come from."""
