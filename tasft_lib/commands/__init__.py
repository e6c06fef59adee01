"""One file per command of `tasft`; each has `main(argv)`."""
