"""Why a model answers a label: the relevance of each tubelet of a clip.

rollout     gradient-weighted attention rollout: one forward and one backward pass
occlusion   covers parts of the clip and classifies it again: slow, and independent of how the model works
result      Explanation, what both are turned into

Modules that serve predictions import this package only when the first explanation is requested.
"""
