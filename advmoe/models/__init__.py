"""The networks: a ResNet-18 for small images, a gate, and the mixture of both. This room imports torch only."""
