"""README's algorithm of one's own, as a file.

    env = vdm_env.make("MovingShapes-HPS", num_envs=4)
    policy = env.make_policy(lora_rank=16)
    algos.run(RewardWeighted(env, policy), budget="2min", out="runs/mine")

Nothing of this repository is subclassed, registered or even imported.
"""

import torch


class RewardWeighted:
    """Fits the videos it samples, weighted by their rewards."""

    def __init__(self, env, policy, lr=1e-4):
        self.env, self.policy = env, policy
        self.optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=lr)
        self.generator = torch.Generator().manual_seed(0)

    def update(self):
        """Collect one batch, learn from it, return what to log."""
        mdp = self.env.mdp
        obs, _ = self.env.reset()
        with torch.no_grad():
            for _ in range(self.env.num_steps):
                obs, reward, *_ = self.env.step(self.policy(obs))
        x0, weight = obs["latents"], torch.softmax(reward, dim=0)
        t = mdp.schedule.sample_timesteps(len(x0), self.generator).to(x0.device)
        noise = torch.randn(x0.shape, generator=self.generator).to(x0.device)
        output = self.policy.predict(mdp.add_noise(x0, noise, t), t, obs["prompt_id"])
        error = (output - mdp.target(x0, noise, t)).square().mean((1, 2, 3, 4))
        loss = (weight * error).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"reward": reward.mean().item(), "loss": loss.item()}

    def state_dict(self):
        """What a run needs to go on exactly where it was; the policy's weights are saved with the policy."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "env": self.env.state_dict(),
        }

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        self.env.load_state_dict(state["env"])
