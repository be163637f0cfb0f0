"""Schedules and predicates over the training step."""

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax.core import schedules

MILLION = 1_000_000


class SparsityScheduleTest(parameterized.TestCase):
  @parameterized.parameters(
    (schedules.constant(0.9), [0.9, 0.9, 0.9, 0.9]),
    (schedules.one_shot(0.9, step=10), [0, 0, 0.9, 0.9]),
    (schedules.polynomial(0.5, 8, 10), [0, 0.5 * 7 / 8, 0.5, 0.5]),
    (schedules.polynomial(0.98, 9, 10), [0, 0, 0.98, 0.98]),
  )
  def test_values_are_strong_float32_scalars(self, schedule, expected):
    compiled = jax.jit(schedule)
    for step, sparsity in zip((0, 9, 10, 10 * MILLION), expected, strict=True):
      for value in (schedule(step), schedule(jnp.int32(step)), compiled(step)):
        np.testing.assert_array_equal(value, np.float32(sparsity))
        self.assertEqual((value.shape, value.dtype), ((), jnp.float32))
        self.assertFalse(value.weak_type)

  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters(1, 2.5, 3)
  def test_polynomial_is_the_equation_of_zhu_and_gupta(self, power):
    start, stop, final = 20, 120, 0.95
    schedule = self.variant(schedules.polynomial(final, start, stop, power))
    steps = np.arange(0, 200, 7)
    progress = np.clip((steps - start) / (stop - start), 0, 1)
    # s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n Δt))^3, with s_i = 0.
    expected = final + (0 - final) * (1 - progress) ** power
    values = [float(schedule(step)) for step in steps]
    np.testing.assert_allclose(values, expected, atol=1e-6)

  def test_polynomial_tells_large_steps_apart(self):
    """Float32 cannot hold 20,000,001; the difference is taken in integers."""
    start = 20 * MILLION
    schedule = schedules.polynomial(0.5, start, start + 4, power=1)
    self.assertEqual(float(schedule(start + 1)), 0.125)

  @parameterized.parameters(-0.1, 1.0, 1.5, float('nan'), float('inf'))
  def test_sparsity_outside_the_unit_interval_is_refused(self, sparsity):
    for make in (
      schedules.constant,
      lambda s: schedules.one_shot(s, 1),
      lambda s: schedules.polynomial(s, 0, 1),
    ):
      with self.assertRaisesRegex(ValueError, r'sparsity.*\[0, 1\).*got'):
        make(sparsity)

  @parameterized.parameters(
    (lambda: schedules.one_shot(0.5, -1), 'step must be.*got -1'),
    (lambda: schedules.polynomial(0.5, 10, 10), 'start=10 and stop=10'),
    (lambda: schedules.polynomial(0.5, 0, 9, power=0), 'power must be.*got 0'),
    (lambda: schedules.polynomial(0.5, 0, 9, np.nan), 'power must be.*got nan'),
    (lambda: schedules.every(0), 'period must be.*got 0'),
    (lambda: schedules.every(2, start=5, stop=5), 'start=5, stop=5'),
    (lambda: schedules.every(2, start=-3), 'start must be.*got -3'),
    (lambda: schedules.at(), 'at least one step'),
    (lambda: schedules.at(4, -1), 'got -1'),
  )
  def test_impossible_settings_are_refused(self, make, message):
    with self.assertRaisesRegex(ValueError, message):
      make()
    with self.assertRaises(TypeError):
      schedules.one_shot(0.5, 1.5)


class WhenTest(parameterized.TestCase):
  @parameterized.parameters(
    (schedules.every(4), [0, 4, 8, 12, 16]),
    (schedules.every(4, start=1), [4, 8, 12, 16]),
    (schedules.every(4, start=4, stop=16), [4, 8, 12]),
    (schedules.every(4, stop=17), [0, 4, 8, 12, 16]),
    (schedules.every(1, start=5, stop=8), [5, 6, 7]),
    (schedules.every(30), [0]),
    (schedules.at(3, 7, 7, 0), [0, 3, 7]),
    (schedules.never, []),
  )
  def test_is_true_at_its_steps_only(self, when, steps):
    compiled = jax.jit(when)
    self.assertEqual([s for s in range(20) if when(s)], steps)
    self.assertEqual([s for s in range(20) if compiled(s)], steps)
    for value in (when(3), when(jnp.int32(3)), compiled(3)):
      self.assertEqual((value.shape, value.dtype), ((), jnp.bool_))
    count_if = lambda count, step: jax.lax.cond(
      when(step), lambda: (count + 1, None), lambda: (count, None)
    )
    count, _ = jax.lax.scan(count_if, jnp.int32(0), jnp.arange(20))
    self.assertEqual(count, len(steps))
