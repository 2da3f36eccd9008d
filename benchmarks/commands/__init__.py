"""The commands of `vdm-env`: each file has a config whose docstrings are the help, and `main(arguments)`."""
