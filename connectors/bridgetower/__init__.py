"""BridgeTower (Xu et al. 2023): the cross-modal stack with bridges, and its connector for clips."""
