/** The server's side of one channel, and chance that can be had again: what model tests are made of. */

/** The server of one channel: it publishes, remembers the newest, and answers as section 4 of the protocol says. */
export class Hub {
  epoch = 1;
  offset = 0;
  subscribed = false;
  toServer = 0; // how many of the socket's messages it has read
  toClient = [];

  /**
   * @param {number} reach how many publications it keeps
   * @param {{knowsLast?: boolean}} [options] whether it knows `last`
   */
  constructor(reach, { knowsLast = true } = {}) {
    this.reach = reach;
    this.knowsLast = knowsLast;
  }

  get position() {
    return { epoch: `e${this.epoch}`, offset: this.offset };
  }

  publish() {
    this.offset += 1;
    if (this.subscribed) {
      this.#send(this.offset);
    }
  }

  /** @param {number} after */
  #replay(after) {
    for (let offset = after + 1; offset <= this.offset; offset += 1) {
      this.#send(offset);
    }
  }

  #send(offset) {
    this.toClient.push(['message', { channel: 'news', offset, data: `${this.epoch}/${offset}` }]);
  }

  restart() {
    this.epoch += 1;
    this.offset = 0;
  }

  connectionLost() {
    this.subscribed = false;
    this.toServer = 0;
    this.toClient = [];
  }

  read({ action, channel, id, since, last }) {
    if (action === 'ping') {
      this.toClient.push(['pong', {}]);
      return;
    }
    if (action === 'unsubscribe') {
      this.subscribed = false;
      this.toClient.push(['unsubscribed', { channel, id }]);
      return;
    }
    this.subscribed = true;
    const answer = { channel, id, ...this.position };
    this.toClient.push(['subscribed', answer]);
    if (since !== undefined) {
      const missing = this.offset - since.offset;
      answer.recovered = since.epoch === answer.epoch && missing >= 0 && (missing === 0 || missing <= this.reach);
      if (answer.recovered) {
        this.#replay(since.offset);
      }
    } else if (last !== undefined && this.knowsLast) {
      this.#replay(Math.max(0, this.offset - Math.min(last, this.reach)));
    }
  }
}

/** Chance that can be had again: a linear congruential generator, Numerical Recipes' constants. */
export function seededChance(seed) {
  let state = seed;
  return () => (state = (1664525 * state + 1013904223) % 2 ** 32) / 2 ** 32;
}
