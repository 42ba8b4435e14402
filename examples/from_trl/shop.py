"""Environment classes in TRL's form: a shop whose tools tell prices and lower them, without and with a reward of its own."""


class Till:
    """One customer at a time. It has no get_reward(): rewards read its attributes."""

    def reset(self, item, price, **kwargs):
        """TRL calls this with the row's columns before each episode; the text is appended to the last user message."""
        self.item, self.prices, self.asked = item, {item: price}, 0
        return f" You have {price + 3} coins."

    def look_up(self, item: str) -> str:
        """
        Look up the price of an item.

        Args:
            item: The name of the item.

        Returns:
            The price in coins.
        """
        self.asked += 1
        return f"{self.prices[item]} coins"

    async def discount(self, percent: int) -> int:
        """
        Ask for a discount.

        Args:
            percent: How much off, in percent.

        Returns:
            The new price in coins.
        """
        self.prices[self.item] = self.prices[self.item] * (100 - percent) // 100
        return self.prices[self.item]


class Shop(Till):
    """Says itself what a conversation was worth."""

    def get_reward(self):
        """TRL calls this at the end of the episode."""
        return 0.5 * min(self.asked, 2) + 0.01 * (100 - self.prices[self.item])
