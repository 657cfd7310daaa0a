"""The command `vivit`: one module per command, and what they share. Not part of the archive.

build, check, classify, convert, demo, evaluate, finetune, serve    the commands; main selects one

archives      the archive that `vivit serve` uses, built if it is missing or outdated
checkpoint    loading a checkpoint strictly
client        classifying a video over REST or gRPC
command       progress and error messages
java          finding Java
keys          finding the key of a running server
ports         free ports
properties    config.properties
server        the TorchServe process
"""
