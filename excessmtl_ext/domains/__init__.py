"""Domains of one loss as tasks: kinds of text, sites, groups of users.

A sample belongs to one of T domains. From one forward pass :func:`domain_losses` makes T losses, and any
balancer weighs them. The weights act on the loss, in ``balancer.backward(losses)`` or, in one pass for any T,
behind :func:`split_domains`; or they decide how often each domain is drawn: :class:`DomainWeights` with
:class:`DomainSampler` (data sets with an index) or :class:`DomainMixture` (streams).
"""

from excessmtl_ext.domains.losses import domain_losses, move_weights, split_domains
from excessmtl_ext.domains.sampling import DomainMixture, DomainSampler
from excessmtl_ext.domains.weights import DomainWeights

__all__ = [
    "DomainMixture",
    "DomainSampler",
    "DomainWeights",
    "domain_losses",
    "move_weights",
    "split_domains",
]
