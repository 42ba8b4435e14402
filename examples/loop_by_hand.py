"""The training loop from its pieces: a sampler, a task, an algorithm, a learner. Four steps of GRPO on additions."""

import random

import groupwise as gw

MODEL, GROUP_SIZE, MAX_TOKENS = "arithmetic-base", 8, 16

model = gw.LanguageModel.load(MODEL)
tokenizer = gw.load_tokenizer(MODEL)
algorithm = gw.named("grpo", beta=0.0)
sampler = gw.NativeSampler(model, tokenizer)
settings = gw.LearnerSection(learning_rate=2e-4, minibatches=2)
learner = gw.LocalLearner(model, algorithm, settings, updates=8, temperature=1.0, max_tokens=MAX_TOKENS)
credit = gw.CreditAssigner(algorithm, tokenizer, MAX_TOKENS)
rng = random.Random(0)

for step in range(4):
    problems = []
    for _ in range(16):
        a, b = rng.randint(1, 20), rng.randint(1, 20)
        problems.append(gw.Problem(id=f"{a}+{b}", prompt=f"{a}+{b}=", answer=str(a + b)))

    # Rollouts: a group of completions for each prompt, scored.
    prompts = [gw.encode_prompt(tokenizer, problem.prompt, chat=False) for problem in problems]
    asked = gw.requests(prompts, GROUP_SIZE, gw.Sampling(max_tokens=MAX_TOKENS), seed=step)
    groups = []
    for problem, prompt, completions in zip(problems, prompts, gw.generate_all(sampler, asked), strict=True):
        right = [completion.text.split("\n")[-1] == problem.answer for completion in completions]
        scores = tuple(gw.Score(reward=float(r), correct=r) for r in right)
        groups.append(gw.Group(problem=problem, prompt_tokens=prompt, completions=completions, scores=scores))

    # Credit: log-probabilities before the first update, then advantages.
    batch, metrics = learner.compute_logprobs(gw.make_batch(groups, algorithm))
    rewards = gw.reward_parts(groups, algorithm, MAX_TOKENS)
    training, _ = credit.assign(batch, groups, rewards, policy_moved=learner.version > 0)

    # Updates: one optimiser step per minibatch, then the sampler takes the new weights.
    for minibatch in gw.minibatches(training, settings.minibatches, seed=step):
        learner.update(minibatch)
    sampler.load(learner.weights(), learner.version)
    print(f"step {step + 1}: mean reward {float(rewards['task'].mean()):.3f}, entropy {metrics['entropy']:.3f}")
