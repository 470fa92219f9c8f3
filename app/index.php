<?php

/** The demo: watch channels live, and broadcast to them through PHP. The form works without JavaScript too. */

declare(strict_types=1);

namespace Demo;

require __DIR__ . '/page.php';

start_session();
$_SESSION['token'] ??= \bin2hex(\random_bytes(32));
$token = $_SESSION['token'];
$outcome = $_SESSION['outcome'] ?? '';
unset($_SESSION['outcome']);
\session_write_close();

send_headers('text/html');
print_head('realtimed: broadcast to every browser');
?>
<body>
  <header>
    <?php print_name(); ?>
    <p id="connection" data-state="connecting">
      <span class="lamp"></span>
      <span id="state" role="status">Connecting…</span>
      <span id="countdown"></span>
      <button id="connect" type="button" class="quiet" hidden>Connect now</button>
      <button id="disconnect" type="button" class="quiet" hidden>Disconnect</button>
    </p>
  </header>

  <noscript><p class="trouble">Messages arrive through a WebSocket, which needs JavaScript. The form below works without it.</p></noscript>
  <p id="trouble" class="trouble" role="alert" hidden></p>

  <main>
    <section id="broadcasting" aria-labelledby="title">
      <h1 id="title"><code>broadcast(<b>'news'</b>, <b>'hello'</b>)</code></h1>
      <p class="lead">Every browser that watches the channel gets it at once. Open this page in a second tab to see it.</p>

      <form id="send" action="send.php" method="post">
        <input type="hidden" name="token" value="<?= escaped($token) ?>">
        <div class="field">
          <label for="channel">Channel</label>
          <input id="channel" name="channel" value="news" list="watched" required autocomplete="off" autocapitalize="off" spellcheck="false">
          <datalist id="watched"><option value="news"></datalist>
        </div>
        <div class="field">
          <label for="message">Message</label>
          <input id="message" name="message" value="hello" required autocomplete="off">
        </div>
        <div class="doing">
          <button type="submit">Broadcast</button>
          <output id="outcome" for="channel message"><?= escaped($outcome) ?></output>
        </div>
      </form>
    </section>

    <section id="watching" aria-labelledby="watching-title">
      <h2 id="watching-title">Channels</h2>
      <form id="subscribe">
        <div class="field">
          <label for="new-channel">Watch another channel</label>
          <input id="new-channel" required autocomplete="off" autocapitalize="off" spellcheck="false" placeholder="sport" aria-describedby="refusal">
        </div>
        <button type="submit" class="quiet">Subscribe</button>
        <p id="refusal" role="alert"></p>
      </form>
      <div id="panels"></div>
      <p class="note">Each panel is one line of JavaScript:
        <code>realtime.subscribe('news', message =&gt; …, { last: 20 })</code>. With <code>last</code> it opens with the
        newest messages that the daemon keeps.</p>
      <p class="note">Disconnect, broadcast, connect again: the missed messages arrive, in order, once. The same happens
        after a tunnel or a restart of the web server, as far back as the daemon’s history reaches.</p>
    </section>

    <section id="coding" aria-labelledby="coding-title">
      <h2 id="coding-title">The same in code</h2>
      <dl id="code">
        <div>
          <dt>PHP</dt>
          <dd><pre><code><i>require 'realtime.php';</i>
<span id="code-php">broadcast('news', 'hello');</span></code></pre></dd>
        </div>
        <div>
          <dt>Shell</dt>
          <dd><pre><code><span id="code-shell">realtimectl broadcast news 'hello'</span></code></pre></dd>
        </div>
        <div>
          <dt>Python</dt>
          <dd><pre><code><i>from realtimed import broadcast</i>
<span id="code-python">broadcast("news", "hello")</span></code></pre></dd>
        </div>
      </dl>
      <p class="note">The clients look for the daemon at <code>/run/realtime.sock</code>, or at <code>REALTIME_SOCKET</code>.</p>
    </section>
  </main>

  <template id="panel">
    <article class="panel" data-state="pending">
      <header>
        <h3></h3>
        <span class="count"></span>
        <button type="button" class="icon"><svg viewBox="0 0 16 16" aria-hidden="true"><path d="M4 4l8 8M12 4l-8 8"/></svg></button>
      </header>
      <ol role="log" tabindex="0"></ol>
    </article>
  </template>

  <script type="module" src="demo.js"></script>
</body>
</html>
