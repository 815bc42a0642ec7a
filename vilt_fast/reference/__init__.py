"""The definition of right: every op in readable PyTorch, in any floating dtype, differentiable by autograd."""
