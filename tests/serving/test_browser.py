"""The page in a real browser: a photograph, a question, its answers and words; by keyboard, in light and dark."""

import os
import shutil

import pytest
import torch
from support import served
from support.models import build

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1100,760",
)  # fmt: skip
SHOTS = os.environ.get("VILT_FAST_SHOTS")  #: a folder for pictures of what was seen


@pytest.fixture
def browser(tmp_path):
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs chromium and chromedriver; one of them is not on PATH")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def test_the_page(browser, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def by(name):
        return browser.find_element(By.ID, name)

    def texts(selector):
        """In one step, for the page may put others there between two."""
        asked = "return [...document.querySelectorAll(arguments[0])].map((found) => found.innerText)"
        return browser.execute_script(asked, selector)

    def dark(on):
        value = "dark" if on else "light"
        feature = [{"name": "prefers-color-scheme", "value": value}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": feature})
        return browser.execute_script("return getComputedStyle(document.body).backgroundColor")

    def shot(name):
        if SHOTS:
            browser.save_screenshot(os.path.join(SHOTS, f"{name}.png"))

    def heat():
        return browser.execute_script(
            "const c = document.getElementById('heat');"
            "const all = [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data];"
            "return all.filter((value, i) => i % 4 == 3 && value).length"
        )

    photo = tmp_path / "photo.png"
    photo.write_bytes(served.encoded(served.noise(64, 96)))
    (tmp_path / "notes.png").write_bytes(b"no image")
    with served.serving(key="k") as client:
        browser.get(f"http://127.0.0.1:{client.port}/")
        served.until(lambda: by("key").is_displayed())  # it is locked, and says so
        assert "a key is needed" in by("error").text
        by("key").send_keys("k", Keys.TAB)
        served.until(lambda: "tiny, float32 on cpu" in by("model").text)
        assert not by("key").is_displayed() and not by("error").is_displayed()
        by("text").send_keys("two dogs", Keys.ENTER)
        served.until(lambda: "no photograph yet" in by("error").text)
        by("file").send_keys(str(tmp_path / "notes.png"))
        served.until(lambda: "cannot show" in by("error").text)
        by("text").send_keys(Keys.ENTER)
        served.until(lambda: "inputs.image is no JPEG" in by("error").text)
        shot("error")
        by("file").send_keys(str(photo))
        served.until(lambda: by("photo").is_displayed() and not by("error").is_displayed())
        by("text").send_keys(Keys.ENTER)
        served.until(lambda: texts("#words button") == ["two", "dogs"])
        expected = client.ask(
            "/vqa", {"inputs": {"image": served.text_of(photo.read_bytes()), "question": "two dogs"}},
            {"Authorization": "Bearer k"},
        )[1]  # fmt: skip
        assert texts("#answers .name") == [a["answer"] for a in expected]
        shares = [float(text.split()[0]) for text in texts("#answers .share")]
        assert shares == [round(100 * a["score"], 1) for a in expected]
        bars = [e.size["width"] for e in browser.find_elements(By.CSS_SELECTOR, "#answers .bar span")]
        assert bars == sorted(bars, reverse=True) and bars[-1] > 0
        assert heat() == 0
        by("ask").send_keys(Keys.TAB, Keys.NULL)
        browser.switch_to.active_element.send_keys(Keys.ENTER)  # the first word, by keyboard
        assert browser.switch_to.active_element.text == "two" and heat() > 0
        assert texts("#words [aria-pressed=true]") == ["two"]
        assert dark(False) != dark(True)
        shot("dark")
        browser.switch_to.active_element.send_keys(Keys.ENTER)
        assert heat() == 0
        browser.get(f"http://127.0.0.1:{client.port}/docs")
        served.until(lambda: len(texts("article")) == 5)
        assert "POST /vqa" in texts("article")[0] and "inputs.question" in texts("article")[0]
        shot("docs")
    with served.serving(model=build("retrieval", torch.float32)) as client:
        browser.get(f"http://127.0.0.1:{client.port}/")
        served.until(lambda: by("ask").text == "Rank")
        by("file").send_keys(str(photo))
        served.until(lambda: by("photo").is_displayed())
        by("text").send_keys("a cat\n\ntwo dogs\na sofa", Keys.CONTROL, Keys.ENTER)
        served.until(lambda: texts("#words button"))
        names = texts("#answers .name")
        assert sorted(names) == ["a cat", "a sofa", "two dogs"]
        assert texts("#words button") == names[0].split()
        browser.find_elements(By.CSS_SELECTOR, "#answers .name")[2].click()
        served.until(lambda: texts("#words button") == names[2].split())
        shot("ranks")
    wrong = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert all("401" in said or "422" in said or "blob:" in said for said in wrong), wrong
