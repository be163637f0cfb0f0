"""ResNet-50 on ImageNet, dense and sparse."""
